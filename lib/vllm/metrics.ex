defmodule VLLM.Metrics do
  @moduledoc """
  The Prometheus metrics of every engine of this node, and of its jobs, at one place.

      {:ok, text} = VLLM.Metrics.text()

  is what Prometheus scrapes, for whatever serves it in your application:

      get "/metrics" do
        conn
        |> put_resp_content_type("text/plain; version=0.0.4")
        |> send_resp(200, VLLM.Metrics.text!())
      end

  vLLM's own metrics (`vllm:…`) and those of each worker's process (`process_…`) come as they are, with
  two labels more: `engine`, the name of the engine, or its pid where it has none, and `replica`,
  from 1. vLLM's own label `engine`, a number, is called `exported_engine`, as Prometheus does where
  a label is taken. A model is named as it was given, without the folders of a path; nothing of prompts
  and no token is in any label.

  The library's own are these, and count since the engine was started, also what happened to workers
  that are gone:

  #{for {name, type, labels, help} <- VLLM.Metrics.Families.own(), do: "  * `#{name}{#{Enum.join(labels, ", ")}}`, #{type} - #{help}\n"}
  [guides/observability.md](guides/observability.md) tells of all of them, and of alerts; a dashboard
  for Grafana is in `priv/grafana`.
  """

  alias VLLM.Bridge.Deadline
  alias VLLM.{Error, Options}
  alias VLLM.Metrics.{Engines, Exposition, Families}

  @doc """
  The metrics in Prometheus' text format, version 0.0.4.

  Every replica is asked at once. One that does not answer in time, or takes no requests, is left
  out, and its `vllm_bridge_up` is 0; so the call never takes longer than its `timeout`. Between two
  calls nothing is done but to count.

      {:ok, text} = VLLM.Metrics.text(timeout: 2_000)

  #{Options.docs(Options.metrics())}
  """
  @spec text(keyword() | map()) :: {:ok, String.t()} | {:error, Error.t()}
  def text(options \\ []) do
    with {:ok, %{timeout: timeout}} <- Options.only(options, Options.metrics()),
         do:
           {:ok,
            timeout |> Deadline.new() |> Engines.now() |> Families.all() |> Exposition.text()}
  end

  @doc "Like `text/1`, but returns the text or raises `VLLM.Error`."
  @spec text!(keyword() | map()) :: String.t()
  def text!(options \\ []), do: Error.bang!(text(options))
end
