"Settings of `make site`: the notebooks as they are stored. Nothing is executed, and a broken link is an error."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "Looper-Math"
extensions = ["myst_nb", "sphinx_external_toc"]
external_toc_path = "../.ci/site/toc.yml"
# report.ipynb is empty without a run
exclude_patterns = ["**/.ipynb_checkpoints", "recipes", "accelerate", "images", "report.ipynb"]
html_theme = "furo"
html_title = "Looper-Math"
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_ipywidgets_js = {}   # no scripts from the network
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_heading_slug_func = "nbconvert.filters.strings._convert_header_id"   # the anchors of JupyterLab


def math(display):
    "A renderer of formulas that browsers show without MathJax, which would come from the network."
    def visit(translator, node):
        translator.body.append(convert(node.astext(), display=display))
        raise SkipNode
    return visit, None


def setup(app): app.add_html_math_renderer("mathml", math("inline"), math("block"))
