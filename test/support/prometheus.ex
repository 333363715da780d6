defmodule VLLM.Prometheus do
  @moduledoc "Reads Prometheus' text format."

  alias VLLM.Bridge.MessagePack

  @doc """
  The series of a text: a map from names and labels to values. Each metric must be there in one piece,
  and no series twice.
  """
  def series(text) do
    {names, samples} =
      text
      |> String.split("\n", trim: true)
      |> Enum.reject(&String.starts_with?(&1, "# HELP"))
      |> Enum.split_with(&String.starts_with?(&1, "# TYPE"))

    unique(for "# TYPE " <> rest <- names, do: rest |> String.split() |> hd())
    samples |> Enum.map(&sample/1) |> unique_keys()
  end

  defp sample(line) do
    [_, name, labels, value] = Regex.run(~r/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$/, line)
    labels = Regex.scan(~r/([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/, labels)

    {{name, Map.new(labels, fn [_, name, text] -> {name, Macro.unescape_string(text)} end)},
     number(value)}
  end

  defp number("NaN"), do: :nan
  defp number("+Inf"), do: :infinity
  defp number("-Inf"), do: :neg_infinity
  defp number(text), do: text |> Float.parse() |> elem(0)

  @doc "The same, by prometheus_client's own parser."
  def parsed(text, folder) do
    path = Path.join(folder, "metrics")
    File.write!(path, text)
    {:ok, python} = VLLM.Python.executable()
    {out, 0} = System.cmd(python, [Path.expand("prometheus.py", __DIR__), path])
    {:ok, families} = MessagePack.decode(out)
    unique(for family <- families, do: family["name"])

    unique_keys(
      for family <- families,
          [name, labels, value] <- family["samples"],
          do: {{name, labels}, value}
    )
  end

  defp unique(names), do: ^names = Enum.uniq(names)

  defp unique_keys(samples) do
    series = Map.new(samples)
    true = map_size(series) == length(samples)
    series
  end

  @doc "The names of the metrics of a text with their types."
  def types(text) do
    for [_, name, type] <- Regex.scan(~r/^# TYPE (\S+) (\S+)$/m, text),
        into: %{},
        do: {name, type}
  end

  @doc "The queries of the dashboard for Grafana."
  def dashboard_queries do
    dashboard = File.read!(Application.app_dir(:ex_vllm, "priv/grafana/vllm.json"))

    for [_, query] <- Regex.scan(~r/"(?:expr|query)": "((?:[^"\\]|\\.)*)"/, dashboard),
        query != "prometheus",
        do: Macro.unescape_string(query)
  end

  @doc "The queries of the guide's alerts."
  def alert_queries do
    guide = File.read!("guides/observability.md")
    for [_, query] <- Regex.scan(~r/^ +expr: ((?:\|\n(?: {10,}.*\n)+)|.*)/m, guide), do: query
  end

  # What is in a query beside metrics.
  @words ~w(sum rate increase histogram_quantile label_values by on and)

  @doc "The metrics that a query asks for."
  def metrics(query) do
    query =
      String.replace(query, ~r/\{[^}]*\}|\[[^\]]*\]|(by|on) \([^)]*\)|, (engine|replica)\)/, " ")

    for [name] <- Regex.scan(~r/[a-zA-Z_:][\w:]*/, query), name not in @words, do: name
  end
end
