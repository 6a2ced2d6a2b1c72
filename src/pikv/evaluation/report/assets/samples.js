// Questions with the answers of one method and of the full cache; the reader chooses the method.
if (DATA.samples) {
  const { methods, full, questions } = DATA.samples;
  const AT_ONCE = 8;
  const [chooser, differ, count, list, more] = ["method", "differ", "count", "list", "more"].map((name) =>
    document.getElementById(`samples-${name}`),
  );
  const others = methods.map((_, index) => index).filter((index) => index !== full || methods.length === 1);
  let shown = AT_ONCE;

  const differs = (question, method) => question.got[method] !== question.got[full];
  others.forEach((index) => chooser.append(element("option", { value: index }, methods[index])));

  const mark = (score) => {
    if (score === null) return "";
    const [name, sign] = score === 1 ? ["right", "✓ right"] : score === 0 ? ["wrong", "✗ wrong"] : ["partly", percent(score, 0)];
    return element("span", { class: `mark ${name}` }, sign);
  };
  const answer = (question, method, title) =>
    element(
      "div",
      { class: "answer" },
      element("p", { class: "who" }, title, " ", mark(question.scores[method])),
      element("p", { class: "said" }, question.texts[question.got[method]] || "(nothing)"),
    );
  const card = (question, method) => {
    const facts = [`context ${question.sample + 1}`];
    if (question.expected !== null) facts.push(`right: ${question.expected}`);
    facts.push(`${percent(question.agreement[method], 0)} of the next tokens agree`);
    return element(
      "article",
      { class: "sample" },
      element("p", { class: "question" }, question.question || "(the text is continued)"),
      element("p", { class: "about" }, facts.join(" · ")),
      element("div", { class: "answers" }, answer(question, full, "full cache"), answer(question, method, methods[method])),
    );
  };
  const show = () => {
    const method = +chooser.value;
    const chosen = questions.filter((question) => !differ.checked || differs(question, method));
    const different = questions.filter((question) => differs(question, method)).length;
    count.textContent = `${methods[method]} answers ${different} of ${questions.length} questions otherwise than the full cache.`;
    list.replaceChildren(...chosen.slice(0, shown).map((question) => card(question, method)));
    more.hidden = chosen.length <= shown;
  };
  const restart = () => {
    shown = AT_ONCE;
    show();
  };
  chooser.addEventListener("change", restart);
  differ.addEventListener("change", restart);
  chooser.form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    shown += 4 * AT_ONCE;
    show();
  });
  differ.checked = others.some((method) => questions.some((question) => differs(question, method)));
  const first = others.find((method) => questions.some((question) => differs(question, method)));
  if (first !== undefined) chooser.value = first;
  show();
}
