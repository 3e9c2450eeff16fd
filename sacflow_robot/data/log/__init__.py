"""The episode log: recorder, writer process, reader, repair."""
