"""Tasks: what is trained, by which loss, on which views, measured how."""
