// Sets the theme before the first paint, and gives `cupelTheme(choice)` to a button. Without a choice the system decides.
// Storage may be forbidden (a page on file:// or in a frame): then the choice lasts as long as the page.
(() => {
  const root = document.documentElement, KEY = "cupel-theme";
  root.classList.add("scripted");
  const remembered = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const remember = (choice) => { try { localStorage.setItem(KEY, choice); } catch { /* lasts as long as the page */ } };
  const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const chosen = remembered();
  if (chosen === "light" || chosen === "dark") root.dataset.theme = chosen;

  window.cupelTheme = {
    now: () => root.dataset.theme || system(),
    set(choice) { root.dataset.theme = choice; remember(choice); },
    /** Make `button` switch between light and dark and say what it will do. */
    button(button) {
      const tell = () => {
        const other = this.now() === "dark" ? "light" : "dark";
        button.textContent = `Switch to ${other} theme`;
      };
      button.addEventListener("click", () => { this.set(this.now() === "dark" ? "light" : "dark"); tell(); });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", tell);
      tell();
    },
  };
})();
