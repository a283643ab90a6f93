"""What happens in a model's heads, measured and predicted: plain numbers in, plain dicts out."""
