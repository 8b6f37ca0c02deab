"""How work is split over ranks: meshes, layouts, state passing, halos, collectives with gradients."""
