"""Infinitely wide networks under gradient descent and under an Adam-like optimizer, beside finite ones."""
