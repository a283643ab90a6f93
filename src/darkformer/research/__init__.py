"""The paper's figures, theory and speed sweeps: imports everything, and only its verbs import it."""
