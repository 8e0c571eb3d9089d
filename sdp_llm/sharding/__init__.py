"""How the parameters that a rank owns are kept: flat, partitioned and in step with their owners."""
