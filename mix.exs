defmodule VLLM.MixProject do
  use Mix.Project

  @version "0.1.0"

  def project do
    [
      app: :ex_vllm,
      version: @version,
      elixir: "~> 1.14",
      elixirc_paths: elixirc_paths(Mix.env()),
      start_permanent: Mix.env() == :prod,
      description: "Language models on your own machines: vLLM under OTP supervision",
      package: package(),
      docs: &docs/0,
      deps: deps()
    ]
  end

  def application do
    [mod: {VLLM.Application, []}, extra_applications: [:logger, :crypto]]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  # Nothing is needed from Hex. Where Hex is there, the optional packages order
  # the start of applications, so that telemetry is up before the first event, and
  # the compilation, so that what a module is compiled for is there before it.
  defp deps do
    if Code.ensure_loaded?(Hex) do
      [
        {:telemetry, "~> 1.0", optional: true},
        {:telemetry_metrics, "~> 1.0", optional: true},
        {:nx, "~> 0.9", optional: true},
        {:plug, "~> 1.14", optional: true},
        {:phoenix_live_dashboard, "~> 0.8", optional: true},
        {:ex_doc, "~> 0.34", only: :dev, runtime: false}
      ]
    else
      []
    end
  end

  defp package do
    [
      licenses: ["Apache-2.0"],
      # priv/python is a link to python/, and Hex packs it as one.
      files:
        ~w(lib priv python/vllm_bridge python/sitecustomize.py python/*.dist-info mix.exs) ++
          ~w(README.md CHANGELOG.md LICENSE),
      exclude_patterns: [~r/__pycache__/]
    ]
  end

  # For `mix docs`, where ex_doc is: pages and modules by their groups, in the order of reading.
  defp docs do
    [
      main: "readme",
      extras: [
        "README.md" | Enum.flat_map(pages(), fn {_group, paths} -> Enum.map(paths, &page/1) end)
      ],
      groups_for_extras: pages(),
      skip_undefined_reference_warnings_on: named(),
      groups_for_modules: modules()
    ]
  end

  defp pages do
    [
      Notebooks:
        ~w(livebooks/start.livemd livebooks/streaming.livemd livebooks/structured_outputs_and_tools.livemd) ++
          ~w(livebooks/embeddings.livemd livebooks/choosing_a_model.livemd livebooks/quantizing_a_model.livemd),
      "In an application":
        ~w(guides/phoenix.md guides/serving.md guides/dashboard.md guides/deploying.md guides/observability.md) ++
          ~w(guides/reliability.md guides/clusters.md guides/scaling.md guides/migrating.md),
      Models:
        ~w(guides/hub.md guides/models.md guides/choosing.md guides/sizing.md guides/quantization.md) ++
          ~w(guides/quantizing.md guides/finetuning.md guides/benchmarking.md),
      "The library":
        ~w(guides/architecture.md guides/protocol.md bench/README.md bench/vllm_versions.md) ++
          ~w(scripts/demo_model/README.md CHANGELOG.md LICENSE)
    ]
  end

  # Pages that name what has none: modules that are hidden, functions of another library, files that are no page.
  defp named do
    ~w(guides/architecture.md guides/protocol.md guides/clusters.md guides/scaling.md guides/migrating.md) ++
      ~w(guides/deploying.md)
  end

  # Of several pages of one name.
  defp page("bench/README.md" = path), do: {path, filename: "benchmarks"}
  defp page("scripts/demo_model/README.md" = path), do: {path, filename: "demo_model"}
  defp page(path), do: path

  defp modules do
    [
      Engines: ~r/^VLLM(\.(LLM|EngineInfo|Replica|Error))?$/,
      Parameters: ~r/^VLLM\.(\w+Params|LoRARequest)$/,
      Results:
        ~r/^VLLM\.(\w+Output|\w*Delta|BeamSearchSequence|ChatMessage|ToolCall|Logprob|Embedding|Classification|Score)$/,
      "Serving and watching":
        ~r/^VLLM\.(Cluster|Server|Plug|Web|LiveDashboard|Metrics|Telemetry)\b/,
      "Models and their formats": ~r/^VLLM\.(Hub|Models|Quantization)\b/,
      "Making models": ~r/^VLLM\.Job\b/,
      Measuring: ~r/^VLLM\.Bench\b/,
      "Tests of applications": ~r/^VLLM\.Test\b/,
      "The wire": ~r/^VLLM\.Bridge\b/
    ]
  end
end
