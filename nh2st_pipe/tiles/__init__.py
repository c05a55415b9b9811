"""Where the tiles of a slide lie: the manifest, spots, a grid over tissue, neighbours."""
