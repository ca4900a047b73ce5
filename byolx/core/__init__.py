"""Configs, processes, meshes, signals, files: what every wing stands on."""
