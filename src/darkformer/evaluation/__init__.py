"""What a model is worth: recall, budgets and their frontier, benchmarks, models side by side."""
