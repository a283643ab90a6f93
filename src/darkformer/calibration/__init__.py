"""Everything between a softmax model and a calibrated one: what its heads lose without their far field."""
