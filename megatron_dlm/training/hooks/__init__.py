"""What happens around optimizer steps, one file a hook."""
