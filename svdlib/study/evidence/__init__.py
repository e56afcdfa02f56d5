"""What the study rests on: tables of many runs, statistics, claims, theory."""
