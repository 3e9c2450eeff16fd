"""The control step of robosuite's Panda in machine code; what it covers, and how it is checked against robosuite."""
