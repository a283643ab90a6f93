"""Whole experiments, from a pretrained model to tables and figures."""
