"""Experiments: trials, what is measured of them, how sure we are, and what the paper claimed."""
