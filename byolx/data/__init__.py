"""Images: what is on disk, how it is split, how views are drawn and made, how batches flow."""
