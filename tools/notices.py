"""Writes THIRD-PARTY-NOTICES.md from `cargo metadata`: every crate the binary is built from, with its licence.

    python tools/notices.py > THIRD-PARTY-NOTICES.md
"""

import json
import subprocess

metadata = json.loads(
    subprocess.run(["cargo", "metadata", "--format-version", "1", "--locked"], capture_output=True, check=True).stdout
)
packages = {p["id"]: p for p in metadata["packages"]}
nodes = {n["id"]: n for n in metadata["resolve"]["nodes"]}
(root,) = [p["id"] for p in metadata["packages"] if p["name"] == "engraft-cli"]

# What the binary links or builds with on any platform; development dependencies of tests are left out.
seen, todo = set(), [root]
while todo:
    node = todo.pop()
    if node in seen:
        continue
    seen.add(node)
    for dep in nodes[node]["deps"]:
        if any(kind["kind"] != "dev" for kind in dep["dep_kinds"]):
            todo.append(dep["pkg"])

print("# Third-party notices\n")
print("The `engraft` binary is built from these crates. Each is used under one of the licences it names; the texts are in")
print("the crates' own packages. Made by `tools/notices.py`.\n")
print("| crate | version | licence |\n| --- | --- | --- |")
for p in sorted((packages[i] for i in seen), key=lambda p: p["name"]):
    if p["source"]:
        print(f"| {p['name']} | {p['version']} | {p['license'] or 'see its package'} |")
print("\n## Model\n")
print("`models/all-minilm-l6-v2` is sentence-transformers/all-MiniLM-L6-v2, Apache-2.0 (its `LICENSE` stands beside it);")
print("weights rounded to F16, unused files left out.")
