"""Whether results are right on this machine: `fastconv check`."""
