"""What training costs in time: accounting from a configuration, calibration of a machine, a loss law in seconds."""
