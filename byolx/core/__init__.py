"""Modules on which all other packages build: configs, processes, meshes, signals, files."""
