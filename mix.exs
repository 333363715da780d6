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
      deps: deps()
    ]
  end

  def application do
    # The httpd of inets is needed by VLLM.Server only.
    [mod: {VLLM.Application, []}, extra_applications: [:logger, :crypto, inets: :optional]]
  end

  defp elixirc_paths(:test), do: ["lib", "test/support"]
  defp elixirc_paths(_env), do: ["lib"]

  # Nothing is needed from Hex. Where Hex is there, the optional packages order
  # the start of applications, so that telemetry is up before the first event.
  defp deps do
    if Code.ensure_loaded?(Hex) do
      [
        {:telemetry, "~> 1.0", optional: true},
        {:telemetry_metrics, "~> 1.0", optional: true},
        {:nx, "~> 0.9", optional: true},
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
end
