"""What every target writes and every user of an engine reads: the manifest, and the paths of the op libraries."""
