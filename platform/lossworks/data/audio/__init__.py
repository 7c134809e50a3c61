"""Sound: files, spectra, songs that are drawn, and the separation of a voice from what accompanies it."""
