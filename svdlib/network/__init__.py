"""Any network, opened once: its layers by kind, and what it is measured by."""
