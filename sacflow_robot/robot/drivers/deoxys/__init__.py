"""A Franka Panda through deoxys: its wire, a driver for the workstation's side, and a twin for the arm's side."""
