"""What ``lossworks bench segmentation`` measures: losses of maps, matching of bars, and large images."""
