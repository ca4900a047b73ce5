"""Images on disk, one module a layout."""
