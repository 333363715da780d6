defmodule VLLM.Job.Settings do
  @moduledoc false
  # How the workers of a job are started.

  alias VLLM.Job.Record

  @typedoc "A function, because what it returns has secrets, which no crash report may show."
  @type t :: (() -> map())

  @doc "The settings of a job: those of its record, and `secrets`, which are on no disk."
  @spec new(Record.t(), %{hf_token: String.t() | nil, env: map()}) :: t()
  def new(%Record{options: options}, secrets) do
    workers = options["workers"] || %{}

    settings = %{
      threads: workers["threads"] || System.schedulers_online(),
      nice: workers["nice"] || 0,
      python: workers["python"],
      quantize_python: workers["quantize_python"],
      hf_token: secrets.hf_token,
      env: secrets.env
    }

    fn -> settings end
  end

  # Every library that computes has a number of threads of its own.
  @threads ~w(OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS RAYON_NUM_THREADS)

  @doc "The environment of the workers."
  @spec environment(map()) :: map()
  def environment(settings) do
    token = if settings.hf_token, do: %{"HF_TOKEN" => settings.hf_token}, else: %{}

    @threads
    |> Map.new(&{&1, settings.threads})
    |> Map.put("EX_VLLM_NICE", settings.nice)
    # Threads that wait for each other by turning round take time from engines, and from each other.
    |> Map.put("OMP_WAIT_POLICY", "passive")
    |> Map.merge(token)
    |> Map.merge(settings.env)
  end
end
