"""Reads shards and brings batches to the device."""
