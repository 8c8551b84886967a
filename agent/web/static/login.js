"use strict";

document.getElementById("login").addEventListener("submit", async (event) => {
  event.preventDefault();
  const said = document.getElementById("said");
  said.textContent = "…";
  try {
    const password = document.getElementById("password").value;
    const answer = await fetch("/login", { method: "POST", body: JSON.stringify({ password }) });
    if (answer.ok) {
      location.replace("/");
      return;
    }
    said.textContent = (await answer.json()).message;
  } catch {
    said.textContent = "The agent does not answer.";
  }
  document.getElementById("password").select();
});
