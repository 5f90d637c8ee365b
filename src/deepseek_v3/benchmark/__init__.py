"""`dsv3 bench`: training and operations beside other systems, each checked before its speed is shown."""
