if Code.ensure_loaded?(Phoenix.LiveDashboard.PageBuilder) do
  defmodule VLLM.LiveDashboard do
    @moduledoc """
    A page of [Phoenix LiveDashboard](https://hexdocs.pm/phoenix_live_dashboard) that shows the engines of
    a node, replica by replica: their states, requests, KV cache, deaths and restarts.

        live_dashboard "/dashboard", additional_pages: [vllm: VLLM.LiveDashboard]

    It is there on each node of the cluster that runs this library, also where that has no Phoenix, and
    changes nothing. For figures over time there are LiveDashboard's own metrics, with
    `VLLM.Telemetry.metrics/0`.
    """

    use Phoenix.LiveDashboard.PageBuilder

    alias VLLM.Metrics.Engines

    # How long replicas may take to tell of themselves, in ms: less than the page waits for the next time.
    @timeout 1_000

    @impl true
    def init(_options), do: {:ok, %{}, process: VLLM.Supervisor}

    @impl true
    def menu_link(_session, %{processes: processes}),
      do: if(VLLM.Supervisor in processes, do: {:ok, "vLLM"}, else: :skip)

    @impl true
    def render(assigns) do
      ~H"""
      <.live_table id="vllm" dom_id="vllm" page={@page} title="Engines" rows_name="replicas" row_fetcher={&rows/2}>
        <:col field={:engine} sortable={:asc} />
        <:col field={:replica} text_align="right" />
        <:col field={:model} sortable={:asc} />
        <:col field={:state} sortable={:asc} />
        <:col field={:running} text_align="right" sortable={:desc} />
        <:col field={:waiting} text_align="right" sortable={:desc} />
        <:col field={:kv_cache} header="KV cache, %" text_align="right" sortable={:desc} />
        <:col field={:deaths} text_align="right" sortable={:desc} />
        <:col field={:restarts} text_align="right" sortable={:desc} />
        <:col field={:load_seconds} header="Loaded in, s" text_align="right" sortable={:desc} />
      </.live_table>
      """
    end

    @doc false
    def rows(%{search: search, sort_by: field, sort_dir: direction, limit: limit}, node) do
      rows = :erpc.call(node, Engines, :rows, [@timeout])
      search = String.downcase(search || "")

      found =
        Enum.filter(rows, &(String.downcase("#{&1.engine} #{&1.model} #{&1.state}") =~ search))

      {found |> Enum.sort_by(& &1[field], direction) |> Enum.take(limit), length(found)}
    end
  end
end
