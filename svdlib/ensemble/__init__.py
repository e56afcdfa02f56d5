"""Many perceptrons of one shape at once: their tensors, a step, the loop, the projection."""
