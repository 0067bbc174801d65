"""The commands of `dsel`, one file each."""
