"""The files shipped with an export; they import torch and transformers only, never this package."""
