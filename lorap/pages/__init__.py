"""Pictures and pages for people: SVG charts, and pages of HTML that need nothing beside them."""
