"""Other trainers' plugins: each module here is imported by the program that it plugs into, never by this package."""
