"""Pure functions of arrays: attention kernels, feature maps, positions, pooling."""
