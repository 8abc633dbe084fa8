"""The site: README, docs/ and the docstrings, by Sphinx. `make docs` builds it, `make docs-serve` shows it.

The docstrings are reStructuredText, so a builder that reads it shows them as they are and checks every name in them.
Pages are read where they lie: the source is the repository's root, so a link leads to the same place here as on GitHub.
Nothing is loaded from other servers, neither by the build nor by a reader of the pages.
"""

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext import napoleon
from sphinx.ext.autodoc import Options
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import avd_core

project = "avd-core"
release = avd_core.__version__
root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**"]
# Not searched for pages: they can be large.
exclude_patterns = [".*", "build", "dist", "runs", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_heading_anchors = 4
highlight_language = "none"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

nitpicky = True

html_theme = "furo"
html_title = f"avd-core {release}"
html_static_path = ["site"]
html_css_files = ["site.css"]
html_extra_path = ["site/index.html"]
html_copy_source = False
html_math_renderer = "mathml"


def _show_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """As MathML, which browsers show without a script."""
    block = isinstance(node, nodes.math_block)
    try:
        mathml = latex2mathml.tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", error, node.astext(), location=node)
        raise nodes.SkipNode from error
    translator.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def _find_public_name(
    app: Sphinx, environment: BuildEnvironment, node: pending_xref, text: nodes.TextElement
) -> nodes.Element | None:
    """The description of a class is at its public name, though a docstring or signature says it in another way.

    Names of other projects stay text, since a build without network cannot look up their pages. So do those of the
    trainer, of which only a few are described, and types in signatures. All else has to be there.
    """
    target = node.get("reftarget", "")
    package = target.partition(".")[0] if "." in target else ""
    home = (node.get("py:module") or "").partition(".")[0]
    python = environment.domains.python_domain
    for public in (f"{package}.{target.rpartition('.')[2]}", f"{home}.{target}"):
        if public in python.objects:
            return python.resolve_xref(environment, node["refdoc"], app.builder, "obj", public, node, text)
    described = ("avd_core", "avd_integrations")
    in_signature = "refexplicit" not in node
    owner = package if package.islower() else home  # a method is named after its class
    return text if in_signature or owner not in described else None


def _read_sections(app: Sphinx, what: str, name: str, obj: object, options: Options, lines: list[str]) -> None:
    """Sections such as Args. In an attribute's description napoleon takes words before a colon for a type."""
    if what not in ("attribute", "data", "property"):
        config = napoleon.Config(napoleon_use_ivar=True, napoleon_use_rtype=False)
        lines[:] = napoleon.GoogleDocstring(lines, config, app, what, name, obj, options).lines()


def _leave_out(app: Sphinx, what: str, name: str, member: object, skip: bool, options: Options) -> bool | None:
    """What pydantic and named tuples add to every class."""
    added = name in ("model_config", "model_post_init") or (member.__doc__ or "").startswith("Alias for field number")
    return True if added else None


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.add_html_math_renderer("mathml", (_show_formula, None), (_show_formula, None))
    app.connect("missing-reference", _find_public_name)
    app.connect("autodoc-process-docstring", _read_sections)
    app.connect("autodoc-skip-member", _leave_out)
