"""Plans training on TPUs: estimates its memory, speed and price, and measures how fast images load."""
