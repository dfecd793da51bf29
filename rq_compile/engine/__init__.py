"""What every target writes and every user of an engine reads: the manifest, and where the op libraries are."""
