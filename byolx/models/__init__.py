"""Networks: residual encoders, projection heads, BYOL's online and target networks."""
