"""Teaching a specialist and training bridges; import what you need from the modules, they pull in torch."""
