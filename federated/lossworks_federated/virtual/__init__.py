"""Virtual time: how long devices with declared speeds would take, and clients that arrive one by one."""
