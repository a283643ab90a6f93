"""The paper's Figures 1 to 5, scaled down to two cores: plan, runs, records, pictures, verdicts."""
