"""`python -m megatron_dlm VERB`: the same as the console command `megatron-dlm`."""

from megatron_dlm.cli.main import main

if __name__ == "__main__":
    main()
