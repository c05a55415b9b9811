"""What each stage does, as typed values read from the YAML files of `stages/`."""
