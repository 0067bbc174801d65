(() => {
  const list = document.getElementById("list");
  if (!list) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const field = id => document.getElementById(id);
  const search = field("search"), kind = field("kind"), run = field("run"), more = field("more");
  const PAGE = 20, COLORS = { dropped: "c1", "not picked": "c3", "largest weight": "c2", "smallest weight": "c4", kept: "c0" };
  let shown = PAGE;

  for (const name of new Set(data.examples.map(e => e.kind))) kind.append(new Option(name, name));
  for (const e of data.examples) {
    e.text = [e.id, e.kind, e.reason, e.by, ...e.texts.flat()].join("\n").toLowerCase();
  }
  const make = (name, classes, text) => {
    const made = document.createElement(name);
    if (classes) made.className = classes;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = v => v === null ? "none" : typeof v === "number" ? String(+v.toPrecision(4)) : v;
  // Text nodes only: whatever a dataset says is shown, never read as markup.
  const marked = (text, word) => {
    const into = document.createDocumentFragment();
    if (!word) { into.append(text); return into; }
    const low = text.toLowerCase();
    let from = 0, at = low.length === text.length ? low.indexOf(word) : -1;
    for (; at >= 0; at = low.indexOf(word, from)) {
      into.append(text.slice(from, at), make("mark", "", text.slice(at, at + word.length)));
      from = at + word.length;
    }
    into.append(text.slice(from));
    return into;
  };
  const fact = (name, value) => {
    const made = make("span", "", name + " ");
    made.append(make("b", "", value));
    return made;
  };
  const card = (e, word) => {
    const made = make("article", "example"), facts = make("div", "facts");
    facts.append(make("span", "tag " + (COLORS[e.kind] || "c7"), e.kind), fact("id", e.id));
    if (data.runs.length > 1) facts.append(fact("run", data.runs[e.run]));
    if (e.by) facts.append(fact(e.by + " score", number(e.score)), fact("decided at step", e.step));
    if (e.weight !== null) facts.append(fact("weight", number(e.weight)));
    facts.append(fact("trained", e.visits + "×"));
    made.append(facts);
    if (e.reason) {
      const why = make("p", "why");
      why.append(marked(e.reason, word));
      if (e.by && e.score !== null) why.append("; this one has ", make("b", "", number(e.score)));
      else if (e.by) why.append("; this one had no score then");
      made.append(why);
    }
    const texts = make("dl");
    for (const [name, text] of e.texts) {
      const said = make("dd");
      said.append(marked(text, word));
      texts.append(make("dt", "", name), said);
    }
    made.append(texts);
    return made;
  };
  const draw = () => {
    const word = search.value.trim().toLowerCase();
    const found = data.examples.filter(e => (!kind.value || e.kind === kind.value)
      && (!run || !run.value || String(e.run) === run.value) && (!word || e.text.includes(word)));
    list.replaceChildren(...found.slice(0, shown).map(e => card(e, word)));
    field("count").textContent = found.length + (found.length === 1 ? " example" : " examples");
    more.hidden = found.length <= shown;
  };
  const anew = () => { shown = PAGE; draw(); };
  search.addEventListener("input", anew);
  kind.addEventListener("change", anew);
  if (run) run.addEventListener("change", anew);
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  // A link can carry a search: report.html#dropped pairs
  search.value = decodeURIComponent(location.hash.slice(1));
  draw();
})();
